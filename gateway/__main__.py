"""The entry of the command line: `incus-gateway` and `python -m gateway`."""

import gc


def main() -> None:
    """Run the command line with what was typed."""
    # imports make many objects and hardly any garbage; looking for it took 20 of a short command's 120 ms
    gc.disable()  # until the command's own module is there: `cli.main`
    from gateway.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
