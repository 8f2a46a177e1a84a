"""The trainer; process 1 begins its first step 40 seconds after the others, as if it had compiled for that long."""

import time

from llm_jax import cli
from llm_jax.parallel import processes
from llm_jax.train import COMMAND
from llm_jax.training import setup

DELAY = 40.0  # Gloo waits for 30 seconds


def main() -> None:
    step, delays = setup.Setup.step, [DELAY]

    def delayed(*arguments):
        if processes.index() == 1 and delays:
            time.sleep(delays.pop())
        return step(*arguments)

    setup.Setup.step = delayed
    cli.start(COMMAND)


if __name__ == "__main__":
    main()
