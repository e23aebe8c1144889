"""The command `pseuzo`: what Ctrl-C ends with before the command line is there to say it."""

import sys


def main() -> None:
    try:
        from pseuzo.cli.commands import main as command

        command(prog_name="pseuzo")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
