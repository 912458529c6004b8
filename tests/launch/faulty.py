"""Workers that undo one thing the engine does, each of which trains wrongly without an error. A test puts one in the place of
`launch.megatron.ranks.Worker`; Ray's processes import it from here."""

from dataclasses import replace

from launch.megatron import cpu
from launch.megatron.rank_actor import Worker


class _Faulty(Worker):
    def spoil(self):
        raise NotImplementedError

    def build(self, *arguments):
        cpu.install()  # megatron.core may be imported now
        self.spoil()
        super().build(*arguments)


class EqualLengths(_Faulty):
    """Right still: pads every sequence to the same length, where batched messages that are mixed up raise nothing."""

    def spoil(self):
        from launch.megatron import batch

        batch.sequence_multiple = lambda layout: 1792  # type: ignore[attr-defined]  # above the longest of the sample


class BatchedP2P(EqualLengths):
    """Interleaved pipelines send their messages in batches, which gloo mixes up."""

    def spoil(self):
        super().spoil()
        from launch.megatron import rank

        original = rank.transformer_config  # type: ignore[attr-defined]

        def config_of(recipe):
            config = original(recipe)
            config.batch_p2p_comm, config.overlap_p2p_comm = True, False
            return config

        rank.transformer_config = config_of  # type: ignore[attr-defined]


class UnreducedExperts(_Faulty):
    """Experts marked as Megatron marks its own (moe/experts.py): without expert parallelism, reduced over the ranks that hold
    the same attention."""

    def spoil(self):
        from launch.model.layers import GroupedLinear

        original = GroupedLinear.__init__

        def init(self, *sizes, config, **kwargs):
            original(self, *sizes, config=config, **kwargs)
            for weight in self.parameters():
                weight.allreduce = config.expert_model_parallel_size == 1

        GroupedLinear.__init__ = init


class SharedStep(_Faulty):
    """A load leaves all parameters Adam's one `step` tensor, as Megatron's own does (distrib_optimizer.py:825)."""

    def spoil(self):
        import torch

        from launch.megatron import optimizer_state

        original = optimizer_state.put

        def put(optimizer, loaded, step):
            original(optimizer, loaded, step)
            shared = torch.tensor(float(step))
            for part in getattr(optimizer, "chained_optimizers", [optimizer]):
                for state in part.optimizer.state.values():
                    state["step"] = shared

        optimizer_state.put = put


class ShiftedLabels(_Faulty):
    """A token's label is the token itself."""

    def spoil(self):
        from launch.megatron import rank

        original = rank.pack  # type: ignore[attr-defined]

        def pack(*arguments):
            batch = original(*arguments)
            return replace(batch, labels=batch.tokens)

        rank.pack = pack  # type: ignore[attr-defined]


class OutOfMemory(Worker):
    """A GPU without room for a step."""

    def call(self, method, *arguments):
        import torch

        if method == "train_step":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().call(method, *arguments)
