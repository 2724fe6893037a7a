"""The command line: `imgsvc serve`, `imgsvc scrub`, `imgsvc config check`, and the Go program's name for the first."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from imgsvc import __version__, config, log
from imgsvc.errors import ConfigError, ImgsvcError, Unavailable
from imgsvc.settings import Settings
from imgsvc.values import size

# argparse ends with the same for a wrong flag. The systemd unit names it, as trying again would not help.
WRONG_SETTING = 2

_SERVE = """Serve guest images until SIGTERM or SIGINT.

Flags win over IMGSVC_ environment variables, those over the config file, and that over the defaults. With no config
file, images and records are kept under the data directory, and the service listens on 127.0.0.1. Exit status: 0 after
such a signal, 2 for a wrong setting, 1 for what may be better at the next try."""

_SCRUB = """Read every image of this host, beside a running service or without one, and hold it against its digest.

An image that does not match is printed and set aside, and is in `error` from then on, unless another member of a
cluster has it. Run it as the user of the service, with the service's settings. Exit status: 0 when all match, 1 when
something was found wrong or could not be read, or it was stopped before its end, 2 for a wrong setting."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    options = _parser().parse_args(arguments)
    status: int = options.run(options)
    return status


def mistify_image_service(arguments: Sequence[str] | None = None) -> int:
    """`imgsvc serve` by the Go program's name and flags, so that a unit file written for it works on."""
    parser = argparse.ArgumentParser(
        prog="mistify-image-service",
        description=_SERVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_serve_flags(parser)
    return _serve(parser.parse_args(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imgsvc", description="Guest image service for hypervisors.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"imgsvc {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="serve images over HTTP",
        description=_SERVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_serve_flags(serve)
    serve.set_defaults(run=_serve)

    scrub = commands.add_parser(
        "scrub",
        help="read all images, and set aside those that are damaged",
        description=_SCRUB,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_store_flags(scrub)
    scrub.add_argument("--bytes-per-second", metavar="BYTES", default="0", help="read no faster (default: full speed)")
    scrub.set_defaults(run=_scrub)

    configuration = commands.add_parser("config", help="look at a config file", allow_abbrev=False)
    actions = configuration.add_subparsers(title="commands", required=True, metavar="COMMAND")
    check = actions.add_parser(
        "check",
        help="say whether the service would start with a config file",
        description="Read a config file and the environment as `imgsvc serve -c FILE` would, and look for the files"
        " and directories that they name. Exit status: 0 or 1.",
        allow_abbrev=False,
    )
    check.add_argument("file", metavar="FILE", type=Path, help="TOML or JSON")
    check.set_defaults(run=_check)
    return parser


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    # Values stay text, so that config.py checks all settings in one place; dest is the setting's key.
    parser.add_argument("-a", "--port", help="port to listen on; 0 takes any free one (default: 20000)")
    parser.add_argument("--host", help='address to listen on; "" is all of them')
    _add_store_flags(parser)


def _add_store_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config-file", metavar="FILE", type=Path, help="TOML or JSON")
    parser.add_argument(
        "-l",
        "--log-level",
        dest="logLevel",
        metavar="LEVEL",
        help="debug, info, warning, error, critical or fatal (default: info)",
    )
    parser.add_argument(
        "--data-dir",
        dest="dataDir",
        metavar="DIR",
        help="where stores are that the config file puts nowhere else (default: ./imgsvc-data)",
    )


def _settings(options: argparse.Namespace) -> Settings:
    """Raises ConfigError; else logs go where they are to go."""
    given = {key: getattr(options, key, None) for key in ("port", "host", "logLevel", "dataDir")}
    flags = {key: value for key, value in given.items() if value is not None}
    settings = config.load(options.config_file, flags, os.environ)
    log.setup(settings.log_level, settings.log_format)
    return settings


def _serve(options: argparse.Namespace) -> int:
    try:
        settings = _settings(options)
        # Late, so that --help and a wrong setting are answered at once, without Tornado, curl and etcd's client.
        from imgsvc.serve import serve  # noqa: PLC0415

        return serve(settings)
    except ConfigError as error:
        return _complain(error, WRONG_SETTING)
    except Unavailable as error:
        return _complain(error, status=1)


def _scrub(options: argparse.Namespace) -> int:
    rate = size()
    try:
        bytes_per_second = rate.read(rate.from_text(options.bytes_per_second))
    except ValueError:
        wrong = ConfigError(f"--bytes-per-second must be {rate.expects}, not {options.bytes_per_second!r}")
        return _complain(wrong, WRONG_SETTING)
    try:
        settings = _settings(options)
        from imgsvc.scrub_now import scrub_now  # noqa: PLC0415 - late, as above

        return scrub_now(settings, bytes_per_second)
    except ConfigError as error:
        return _complain(error, WRONG_SETTING)
    except Unavailable as error:
        return _complain(error, status=1)


def _check(options: argparse.Namespace) -> int:
    try:
        config.load(options.file, flags={}, environ=os.environ)
    except ConfigError as error:
        return _complain(error, status=1)
    print(f"{options.file}: ok")  # noqa: T201 - the answer
    return 0


def _complain(error: ImgsvcError, status: int) -> int:
    print(f"imgsvc: {error}", file=sys.stderr)  # noqa: T201 - there may be no log yet, and a person is waiting
    return status
