"""Run by a Python that has the pinned slime and Megatron-LM: an argument list on standard input, as JSON; out come, as JSON, the
fields of the `TransformerConfig` that slime makes of it, and the name of every flag."""

import argparse
import contextlib
import dataclasses
import json
import sys
from types import SimpleNamespace

import cpu_stubs  # of the reference folder: packages that slime imports and does not call here

cpu_stubs.install()

import torch  # noqa: E402

# Asked for a GPU's architecture alone.
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, minor=0)  # type: ignore[assignment]
flags: set[str] = set()
parse_known_args = argparse.ArgumentParser.parse_known_args


def noted(self, *args, **kwargs):
    names = {name for action in self._actions for name in action.option_strings}
    if names & {"--tensor-model-parallel-size", "--debug-train-only"}:
        flags.update(name for name in names if name.startswith("--"))
    return parse_known_args(self, *args, **kwargs)


argparse.ArgumentParser.parse_known_args = noted
sys.argv = ["train_async.py", *json.load(sys.stdin)]
with contextlib.redirect_stdout(sys.stderr):
    import megatron.core.utils as utils
    import packaging.version
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer.moe import moe_utils
    from megatron.training.arguments import core_transformer_config_from_args
    from slime.utils.arguments import parse_args

    # Transformer Engine's presence is asked for, its functions are not called.
    utils._te_version = packaging.version.Version("2.16.1")
    rope_utils.fused_apply_rotary_pos_emb = rope_utils.fused_apply_rotary_pos_emb_thd = print
    for name in ("", "_with_probs", "_and_pad_with_probs"):
        setattr(moe_utils, f"fused_permute{name}", print)
    moe_utils.fused_unpermute = moe_utils.fused_sort_chunks_by_index = (
        moe_utils.fused_sort_chunks_by_index_with_probs
    ) = print
    arguments = parse_args()
    config = core_transformer_config_from_args(arguments)
fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
of_arguments = (
    "vocab_size",
    "rotary_base",
    "rotary_percent",
    "untie_embeddings_and_output_weights",
    "position_embedding_type",
)
print(
    json.dumps(
        {
            "config": {**fields, **{name: getattr(arguments, name) for name in of_arguments}},
            "flags": sorted(flags - {"--help"}),
        },
        default=lambda value: getattr(value, "__name__", str(value)),
    )
)
