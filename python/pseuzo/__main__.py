"""The command `pseuzo`. It handles Ctrl-C and a missing extra while the command line imports."""

import logging
import sys
import warnings

from pseuzo.extras import how_to_install, missing_train_modules


def main() -> None:
    try:
        if missing := missing_train_modules():
            print(how_to_install("the command line", missing), file=sys.stderr)
            raise SystemExit(2)
        # A user wants to know what a warning says, and not which line of which file it is from.
        warnings.formatwarning = lambda message, *rest, **more: f"{message}\n"
        for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # no news for a user
            logging.getLogger(name).setLevel(logging.ERROR)
        from pseuzo.cli.commands import main as command

        command(prog_name="pseuzo")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
