"""The checks of a served export in steps: its answers on trained and on held-out prompts, its losses, and the base's."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.files import write_text
from data_prep.reading import SERVER
from data_prep.text.tokenizer import load_tokenizer
from launch.checks import Check, Outcome, judged
from launch.sanity.behaviour import answers, parsers, prompts
from launch.sanity.behaviour.turns import (
    GREEDY,
    SAMPLED,
    Answer,
    Turn,
    ask,
    longest_answer,
    spread,
    turns,
    usual_answer,
)
from launch.sanity.likelihood import likelihood_checks, retention
from launch.sanity.likelihood import scores as likelihood
from launch.sanity.likelihood.retention import Retention
from launch.sanity.likelihood.scores import Scores
from launch.sanity.loop import loop
from launch.sanity.subject import Subject
from launch.serving import weight_swap
from launch.serving.client import Client
from recipes.checkpoint.checkpoint_config import read_config

_OF_BASE = (
    32  # prompts for the base: if it answers none of 32, it answers fewer than one in ten of all, at 95% confidence
)

Progress = Callable[[], None]  # called after every answered request
Step = tuple[str, int, Callable[[Progress], list[Check]]]  # name, number of requests, and the function that runs it


class Served:
    """The checks of one export on one server.

    The server first has the export's weights. If this command started it, it later loads the base's.
    """

    def __init__(self, subject: Subject, client: Client) -> None:
        self.subject, self.client, self.recipe = subject, client, subject.recipe
        # The base's tokenizer, with which the data was packed: the export's may be broken.
        tokenizer = load_tokenizer(Path(subject.recipe.model.checkpoint))
        self._decode: Callable[[list[int]], str] = lambda tokens: str(tokenizer.decode(tokens))
        most = subject.recipe.sanity.prompts
        self._trained = spread(list(turns(subject.data)), most)
        self._new = spread(list(turns(subject.heldout)), most) if subject.heldout else []
        self._usual = usual_answer(subject.data)
        self._answered: list[Answer] = []  # greedy answers
        self._right: list[Turn] = []  # turns of the training data that are answered correctly, with calls
        self._scores: Scores | None = None

    def steps(self) -> Iterator[Step]:
        """Yield the steps in order. A step may run after another failed, as long as the server answers."""
        sequences = self._sequences()
        yield "served", 1, self._served
        yield "held-out loss", sequences, self._likelihood
        yield "answers", len(self._trained) + 2 * len(self._new), self._answers
        yield "chat template", 1, self._prompts
        yield "parsers", 1, self._parsers
        yield "streaming", 1, self._streaming
        yield "closed loop", 1, self._closed_loop
        if self.client.own:
            yield "the base", len(self._of_base()) + sequences, self._base

    def _calling(self) -> list[Turn]:
        return [t for t in self._trained if t.expected]

    def _of_base(self) -> list[Turn]:
        """Return the sample of prompts for the base, which is compared but not judged.

        It is small because an untrained model never stops.
        """
        calling = self._calling()
        drawn = random.Random(self.recipe.seed).sample(range(len(calling)), min(_OF_BASE, len(calling)))
        return [calling[n] for n in sorted(drawn)]

    def _sequences(self) -> int:
        return len(self.subject.heldout.ids) if self.subject.heldout else 0

    def _served(self, progress: Progress) -> list[Check]:
        architecture = read_config(self.subject.export)["architectures"][0]
        found = (self.client.get("/model_info").get("architectures") or ["?"])[0]
        version = f"SGLang {self.client.get('/server_info').get('version', '?')}"
        progress()
        outcome, detail = judged(found == architecture), ""
        if outcome is Outcome.passed and version != SERVER:
            outcome = Outcome.warned
            detail = f"the data follow the reading of {SERVER}: another version may send other prompts, which 'chat template' compares"
        return [
            Check("served", "a checkpoint that no server loads", f"{found}, {version}", f"{architecture}, {SERVER}", outcome, detail)
        ]  # fmt: skip

    def _likelihood(self, progress: Progress) -> list[Check]:
        if self.subject.heldout is None:
            return [
                Check("held-out loss", "training that does not help", "not measured: data.heldout is not set", "shown",
                      Outcome.warned, "write data.heldout=FILE with trajectories that were not trained on")
            ]  # fmt: skip
        self._scores = self._measured(progress)
        alone = self._compared(self._scores, None)
        return [likelihood_checks.beside_trainer(self._scores, alone.whole, self.subject.loss, self.recipe)]

    def _measured(self, progress: Progress) -> Scores:
        assert self.subject.heldout is not None
        return likelihood.measure_likelihood(self.client, self.subject.heldout, progress)

    def _compared(self, trained: Scores, base: Scores | None) -> Retention:
        """Compare the scores, write `likelihood.json`, and return the comparison."""
        found = retention.compare(trained, base)
        text = json.dumps(retention.as_json(found), indent=2)
        write_text(self.subject.folder / "likelihood.json", text + "\n")
        return found

    def _answers(self, progress: Progress) -> list[Check]:
        limits = self.recipe.sanity
        after = self._ask(self._trained, GREEDY, progress)
        new = self._ask(self._new, GREEDY, progress)
        sampled = self._ask(self._new, SAMPLED, progress)
        self._answered = after + new
        self._right = [a.turn for a in after if a.right and a.calls]
        return [
            answers.right_calls("calls on trained prompts", after, limits.min_tool_calls),
            answers.right_calls("calls on held-out prompts", new, None),
            answers.right_calls("calls on held-out prompts, sampled", sampled, None),
            *answers.all_checks(after + new + sampled, self.recipe.model.family, limits.min_well_formed),
        ]

    def _ask(self, asked: list[Turn], sampling: dict[str, float], progress: Progress) -> list[Answer]:
        return ask(self.client, asked, self._usual, sampling, progress)

    def _prompts(self, progress: Progress) -> list[Check]:
        done = prompts.parity(self.client, self._trained + self._new, self._answered, self._decode)
        progress()
        return [done]

    def _parsers(self, progress: Progress) -> list[Check]:
        done = parsers.gold(self.client, self._new + self._trained, self.recipe.model.family, self._decode)
        progress()
        return done

    def _streaming(self, progress: Progress) -> list[Check]:
        done = parsers.streaming(self.client, self._right, self._usual)
        progress()
        return [done]

    def _closed_loop(self, progress: Progress) -> list[Check]:
        tokens = longest_answer(self.subject.data)
        done = loop.closed_loop(
            self.client, self.subject.data, self.subject.heldout, tokens, self.recipe.sanity.min_finished
        )
        progress()
        return done

    def _base(self, progress: Progress) -> list[Check]:
        """Load the base's weights into the same server and compare the model before and after training."""
        weight_swap.load(self.client, self.recipe.model.checkpoint)
        before = self._ask(self._of_base(), GREEDY, progress)
        done = [answers.beside_base(before, self._answered, len(self._calling()))]
        if self._scores is not None:
            base = self._measured(progress)
            done += likelihood_checks.beside_base(self._compared(self._scores, base), base, self.recipe)
        return done
