"""Parse the words of a command, `[STAGE] [name=value ...]`, into a stage and its overrides."""

import shlex

from launch.cli.stages import STAGES
from recipes.compose.kinds import shown, typed
from recipes.compose.names.instead import is_like_option
from recipes.compose.names.nearest import folded, nearest
from recipes.compose.overrides import without_value
from recipes.errors import ConfigError

# What other tools call a stage.
_ELSEWHERE = {
    "finetune": "train", "fine_tune": "train", "finetuning": "train", "sft": "train", "tune": "train", "fit": "train",
    "run": "train", "start": "train", "submit": "train", "resume": "train", "training": "train", "pretrain": "train",
    "preprocess": "data", "prepare": "data", "tokenize": "data", "tokenise": "data", "pack": "data", "dataset": "data",
    "download": "fetch", "pull": "fetch",
    "show": "inspect", "view": "inspect", "list": "inspect",
    "estimate": "plan", "memory": "plan", "search": "plan",
    "validate": "check", "verify": "check", "preflight": "check", "doctor": "check",
    "smoke": "rehearse", "dryrun": "rehearse",
    "convert": "export", "merge": "export",
    "eval": "sanity", "evaluate": "sanity", "evaluation": "sanity",
    "deploy": "serve", "server": "serve", "serve_model": "serve", "launch_server": "serve", "infer": "serve",
    "inference": "serve", "generate": "serve", "chat": "serve", "api": "serve",
    "benchmark": "bench", "profile": "bench",
    "logs": "attach", "log": "attach", "status": "attach", "watch": "attach", "follow": "attach",
    "cancel": "stop", "kill": "stop",
    "sbatch": "slurm", "srun": "slurm", "k8s": "kuberay", "kubernetes": "kuberay",
}  # fmt: skip


def parted(words: list[str]) -> tuple[str, list[str]]:
    """Return the stage (`train` if none is named) and the overrides.

    Raise `ConfigError` for a word that is neither, and for two stages.
    """
    _refuse_spaces(words)
    named = [word for word in words if "=" not in word]
    for place, word in enumerate(words):
        if "=" not in word and word not in STAGES:
            following = words[place + 1] if place + 1 < len(words) else ""
            raise _neither(word, "" if "=" in following or following in STAGES or _dashed(following) else following)
    named = list(dict.fromkeys(named))
    if len(named) > 1:
        commands = " and then ".join(f"`make {stage}`" for stage in named)
        raise ConfigError(
            f"{' and '.join(named)} are {len(named)} stages, and a command is one",
            f"run {commands}, each with its overrides",
        )
    return (named or ["train"])[0], [word for word in words if "=" in word]


def _refuse_spaces(words: list[str]) -> None:
    """Raise `ConfigError` for spaces around `=`: a shell splits `name = value` into several words."""
    for place, word in enumerate(words):
        before, after = words[place - 1 : place] if place else [], words[place + 1 : place + 2]
        if word.startswith("=") and before and "=" not in before[0]:
            said = [*before, word, *(after if word == "=" else [])]
        elif word.endswith("=") and word != "=" and after and "=" not in after[0] and after[0] not in STAGES:
            said = [word, *after]
        else:
            continue
        raise ConfigError(
            f"'{shown(' '.join(said))}' has a space beside its '='", f"write {shown(shlex.quote(''.join(said)))}"
        )


def _dashed(word: str) -> bool:
    """Return whether the word looks like `--option`, and is not a negative number."""
    return typed(word).lstrip("-")[:1].isalpha() and typed(word).startswith("-")


def _neither(word: str, following: str) -> ConfigError:
    """Return the error for a word that is not a stage and has no `=`. following: the next word, if it may be the value."""
    here = _ELSEWHERE.get(folded(word))
    if not here and is_like_option(word):
        return without_value(word, following)
    near = nearest(typed(word), STAGES)
    meant = f"here it is {here}: " if here else f"the nearest is {near}: " if near else ""
    return ConfigError(
        f"'{shown(word)}' is no stage and not name=value",
        f"{meant}the stages are {', '.join(STAGES)}; `make help` says what each does",
    )
