"""Entry point of `python -m edgelm` and of the `edgelm` script. Ctrl-C works even while modules are being imported."""

from __future__ import annotations

try:
    from edgelm.cli.common.interrupts import leave_at_once
except KeyboardInterrupt:
    raise SystemExit(130) from None


def main() -> None:
    """Run the command line and exit."""
    leave_at_once()
    from edgelm.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
