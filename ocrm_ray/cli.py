"""The program ``ocrm-ray``: light to import, commands import what they need.

Exit status: 0 done; 1 a failure of the run; 2 the user's mistake, one line a problem on stderr, nothing written;
130 interrupted.
"""

import argparse
import errno
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ocrm_ray import __version__
from ocrm_ray.errors import Problem, RunError, UserError

if TYPE_CHECKING:
    from ocrm_ray.config import RunConfig, StudyConfig

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130
DISK_FAULTS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)
"""Told without a traceback: what is wrong is the disk or a path, not the program."""
RESUME = (
    "go on in a run folder that has been used: finished stages (data, SFT, pairs, reward model) are not done "
    "again; RL continues from its last checkpoint, and starts over where there is none"
)

JOBS = "so many runs at once, each with the processes and the memory of one (default 1)"

ADDRESS = "of a Ray cluster, or auto for that of this machine: say what of the configuration has no place on it now"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except SystemExit as stop:  # of argparse
        return stop.code if isinstance(stop.code, int) else MISTAKE
    except UserError as error:
        _say(str(error))
        return MISTAKE
    except OSError as error:
        _say(f"error: {_known_cause(error) or error}")
        return FAILED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """A command is a function below: its name less the underscore, its docstring the help."""
    parser = argparse.ArgumentParser(
        prog="ocrm-ray",
        description="RLHF on Ray with a reward model that is corrected while the policy moves.",
        epilog="CONFIG is a run, or a study (with arms). Paths in it are relative to the current directory.",
    )
    parser.add_argument("--version", action="version", version=f"ocrm-ray {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="name")
    for function in (_check, _rehearse, _run, _study, _report):
        command = commands.add_parser(function.__name__[1:], help=function.__doc__)
        command.set_defaults(command=function)
        if function is _report:
            command.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run, or of a study")
            continue
        command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
        text = "set a dotted key, such as policy.num_updates=20"
        command.add_argument("overrides", nargs="*", metavar="key=value", help=text)
        if function is _check:
            command.add_argument("--address", metavar="HOST:PORT", help=ADDRESS)
        if function is _run:
            command.add_argument("--resume", action="store_true", help=RESUME)
        if function is _study:
            command.add_argument("--jobs", type=_positive, default=1, metavar="N", help=JOBS)
    # argparse takes positionals that follow an option for unknown arguments: overrides may stand anywhere.
    arguments, rest = parser.parse_known_args(argv)
    options = [text for text in rest if text.startswith("-") or "overrides" not in arguments]
    if options:
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, need a whole number from 1")
    return int(text)


def _check(arguments: argparse.Namespace) -> int:
    """resolve and validate a configuration and predict a step; touch nothing"""
    from ocrm_ray.config_file import load_any, load_run_config
    from ocrm_ray.overview import show

    if arguments.address is None:
        config = load_any(arguments.config, arguments.overrides)
        _refuse(config)
        show(config)
        return DONE
    os.environ["RAY_ADDRESS"] = arguments.address  # as for the run: this machine's size plays no part
    config = load_run_config(arguments.config, arguments.overrides)
    _refuse(config)
    show(config)
    from actors.placement import require_room

    sys.stdout.write(require_room(config.pools, arguments.address) + "\n")
    return DONE


def _rehearse(arguments: argparse.Namespace) -> int:
    """run the coordinator over actors that only take time: its step against the slowest pool alone"""
    from ocrm_ray.checks import contradictions
    from ocrm_ray.config_file import load_run_config
    from ocrm_ray.rehearsal import prepared

    config = load_run_config(arguments.config, arguments.overrides)
    if problems := contradictions(config):
        raise UserError(problems)
    config = prepared(config)
    from actors.rehearsal import rehearse

    return _guarded(arguments, lambda: rehearse(config), None)


def _run(arguments: argparse.Namespace) -> int:
    """run everything: SFT, pairs, reward model, RL with corrections, report"""
    from ocrm_ray.config_file import anchored, load_run_config
    from ocrm_ray.inspection import occupied

    config = load_run_config(arguments.config, arguments.overrides)
    _refuse(config, [] if arguments.resume else occupied(config))
    from actors.launcher import run

    return _guarded(arguments, lambda: run(anchored(config, Path.cwd()), arguments.resume), config.run_dir)


def _study(arguments: argparse.Namespace) -> int:
    """run arms x seeds over shared stages; finished runs are skipped"""
    from ocrm_ray.config_file import load_study_config

    study = load_study_config(arguments.config, arguments.overrides)
    _refuse(study)
    from actors.launcher import run_study

    return _guarded(
        arguments, lambda: run_study(study, arguments.jobs), study.output_dir / study.name / "ARM" / "seed-N"
    )


def _report(arguments: argparse.Namespace) -> int:
    """rebuild report.html and plots/ from the files of a run folder"""
    from ocrm_ray.report import write_report
    from ocrm_ray.study_report import rewrite_study

    folder: Path = arguments.run_dir
    page = rewrite_study(folder) if (folder / "study.json").is_file() else write_report(folder)
    sys.stdout.write(f"{page}\n")
    return DONE


def _refuse(config: "RunConfig | StudyConfig", more: Sequence[Problem] = ()) -> None:
    """Raises UserError with all that ``check`` finds, and ``more``."""
    from ocrm_ray.checks import contradictions, inspect, study_problems
    from ocrm_ray.config import StudyConfig

    found = study_problems(config) if isinstance(config, StudyConfig) else [*contradictions(config), *inspect(config)]
    if problems := list(dict.fromkeys([*found, *more])):
        raise UserError(problems)


def _program() -> list[str]:
    """How this program was started: as the console script, or by Python."""
    script = Path(sys.argv[0]).name
    return [script] if script == "ocrm-ray" else [sys.executable, "-m", "ocrm_ray"]


def _guarded(arguments: argparse.Namespace, launch: Callable[[], str], folder: Path | None) -> int:
    """Launch and print its closing words; a failure is told as its cause, where the logs are, how to resume.

    Without a run ``folder`` there is nothing to resume.
    """
    option = ["--resume"] if arguments.name == "run" else []
    option += ["--jobs", str(arguments.jobs)] if getattr(arguments, "jobs", 1) > 1 else []
    again = shlex.join([*_program(), arguments.name, str(arguments.config), *option, *arguments.overrides])
    resume = f"{'resume' if folder else 'again'}: {again}"
    try:
        sys.stdout.write(f"{launch()}\n")
        return DONE
    except UserError:
        raise
    except KeyboardInterrupt:
        _say("interrupted", resume)
        return INTERRUPTED
    except Exception as error:
        cause = _known_cause(error)
        from actors.session import log_folder

        _say(
            f"error: {cause or f'{type(error).__name__}: {error}'}",
            *([f"run folder: {folder}", f"events: {folder / 'events.jsonl'}"] if folder else []),
            f"logs of the processes: {log_folder()}",
            resume,
            *([] if cause else ["", traceback.format_exc().rstrip()]),
        )
        return FAILED


def _known_cause(error: Exception) -> str | None:
    """What ended a run, in words; None of what nobody foresaw."""
    if isinstance(error, RunError):
        return str(error)
    told = re.search(r"\(os error (\d+)\)", str(error))  # so safetensors tells the system's errors
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    if number not in DISK_FAULTS:
        return None
    path = getattr(error, "filename", None)
    return os.strerror(number).lower() + (f": {path!r}" if path else "")


def _say(*lines: str) -> None:
    sys.stderr.write("\n".join(lines) + "\n")
