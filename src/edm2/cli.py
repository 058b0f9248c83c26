"""The `edm2` command: finds the command's module, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done; 1 failed; 2 wrong input; 75 stopped by a signal after saving a checkpoint: the same command
continues. Under torchrun, which takes every other code for a failure, a stop ends with 0.
"""

import difflib
import gc
import importlib
import keyword
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NoReturn

from edm2.extras import advice
from edm2.memory import keep_freed_memory
from edm2.progress import show, tell

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 1, 2, 75

# Command to what it does; a dict holds the commands of a group.
COMMANDS: dict[str, Any] = {
    "demo": "train, tune, sample and measure on handwritten digits, in minutes",
    "train": "train a model on your images, or continue a run",
    "data": {
        "": "inspect images, bring them to one size, encode them to latents and back",
        "info": "show counts, sizes, classes, mean and standard deviation, and what needs fixing",
        "convert": "bring images to one size and mode, in a ZIP or folder",
        "encode": "encode images to latents for a latent diffusion model",
        "decode": "decode latents to pictures",
    },
    "suggest": "suggest settings for your images and your time, each with its reason",
    "ema": {
        "": "average the weights of a run over any length, after training",
        "list": "list the contents of a snapshot folder",
        "verify": "check every file of a folder against its sha256",
        "plan": "choose which averages to track and when to store them, within a budget",
        "reconstruct": "write models with any EMA length from a run's snapshots",
        "merge": "average checkpoints of a training that tracked no EMA",
        "profile": "draw the profiles of the wanted averages and of their reconstructions",
    },
    "sample": "generate images with a model",
    "forecast": "forecast sequences of fields step by step, as an ensemble",
    "tune": "find a run's best EMA length, guide and guidance",
    "distill": "turn a model into one that makes images in one to four evaluations",
    "ladder": "train configurations A to G on the same images and compare them",
    "metrics": {
        "": "score images, and store everything that the scores depend on",
        "ref": "measure a data set once, to use it as a reference",
        "score": "score images against a reference",
        "compare": "compare two sets of images, or two results",
        "ensemble": "score forecasts: CRPS, spread and skill, ranks, reliability, spectra",
    },
    "studio": "see in the browser what EMA length and guidance do to a run's images",
    "probe": "classify images from a network's features with a linear classifier",
    "export": "write a model for torch.export, ONNX or diffusers",
    "report": "write a page about one run, or about several side by side",
    "import": "convert the released models and other official files to safetensors",
    "info": "describe a preset, a saved model or a run",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; returns when it is done, else ends the process with one of the exit codes above."""
    _prepare_streams()
    keep_freed_memory()
    _wait_asleep()
    warnings.showwarning = _show_warning
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # at exit it would be too late to notice a reader that has gone
    except ModuleNotFoundError as error:
        told = advice(error, "this command")
        if told is None:
            raise
        end(f"error: {told}", EXIT_BAD_INPUT)
    except (ValueError, FileExistsError, NotADirectoryError) as error:
        end(f"error: {_mistake(error)}", EXIT_BAD_INPUT)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_FAILED) from None
    except (OSError, FloatingPointError) as error:
        end(f"error: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        end("interrupted", EXIT_FAILED)


def _prepare_streams() -> None:
    """Replace the streams that a service, cron or pythonw leaves closed, and let the others write any character."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # In this order they take the free numbers 0 to 2, which a data file would get otherwise.
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 - for good
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _wait_asleep() -> None:
    """Let PyTorch's threads, which torch starts when it is imported, sleep soon while they wait for each other.

    They would spin for milliseconds. Where other work needs the processors, too, that keeps the thread that is waited
    for from running, hundreds of times an evaluation. The user's own settings of OpenMP have precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _run(words: list[str]) -> None:
    name, table = "edm2", COMMANDS
    while True:
        if not words or words[0] in ("-h", "--help"):
            return _print_help(name, table)
        if words[0] == "--version":
            from edm2 import __version__

            return show(__version__)
        word, words = words[0], words[1:]
        if not word or word not in table:
            near = difflib.get_close_matches(word, table, n=2, cutoff=0.4)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"there are {', '.join(filter(None, table))}"
            )
            raise ValueError(f"unknown command {name} {word}: {hint}")
        name = f"{name} {word}"
        if not isinstance(table[word], dict):
            break
        table = table[word]

    _, command, *rest = name.split()
    # A module cannot be named after a Python keyword, as the command `import` is.
    module = _imported(f"edm2.commands.{command}{'_' * keyword.iskeyword(command)}")
    from edm2.commands.common import HELP, take_common, tidy_help
    from edm2.train.signals import Stopped
    from edm2.train.world import FirstFailed

    words = take_common(name, words)
    wants_help = not {"-h", "--help"}.isdisjoint(words)
    try:
        with tidy_help(vars(module).values()) if wants_help else nullcontext():
            getattr(module, rest[0] if rest else "run")(name, words)
    except SystemExit:
        if wants_help:
            show(HELP)
        raise
    except Stopped as stop:
        end(str(stop), EXIT_STOPPED)
    except FirstFailed:  # the first process says why
        raise SystemExit(EXIT_FAILED) from None


def _imported(name: str) -> ModuleType:
    """A command's module, imported when it is needed: it loads torch, and the overview should come at once."""
    if "torch" in sys.modules:
        return importlib.import_module(name)
    # While torch is imported, and each time later, collecting garbage takes a tenth of a second and finds none in it.
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _mistake(error: ValueError | OSError) -> str:
    # Our own errors have no number; the system's mean a file where a folder is needed.
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename} is a file, or is inside one, and a folder is needed: choose another path"
    return str(error)


def _print_help(name: str, table: dict[str, Any]) -> None:
    show(f"usage: {name} COMMAND [options]\n")
    for command, text in table.items():
        if command:
            show(f"  {command:<12} {text[''] if isinstance(text, dict) else text}")
    show(f"\nFor the options of a command: {name} COMMAND --help")


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    tell(f"edm2: warning: {message}")


def end(text: str, code: int) -> NoReturn:
    """End the process with a message on standard error, which names the process unless it is torchrun's first."""
    rank = os.environ.get("RANK", "0")
    tell(f"edm2: {text}" if rank == "0" else f"edm2: process {rank}: {text}")
    raise SystemExit(code)
