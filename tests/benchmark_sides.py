"""Trivial implementations to be measured by `test_benchmarks.py`."""

from experiments.benchmarks.worker import Job


def constant(rate: float = 1.0, loss: float = 2.0, fails_at: int = 99) -> Job:
    """Prints on stdout, as libraries do, which must not disturb the answers."""

    def turn(number: int) -> dict[str, float]:
        print("noise", flush=True)
        if number == fails_at:
            raise ValueError(f"turn {number}")
        seconds = 5.0 if number < 0 else 1.0
        return {"items/s": rate + number, "seconds": seconds, "CPU seconds": 2 * seconds, "loss": loss}

    return Job(turn, "toy 1.0", {"bounds": [["items/s", "read GB/s", 2.0]]})


def bound() -> Job:
    """A machine that reads 8 GB/s."""
    return Job(lambda number: {"read GB/s": 8.0}, "toy 1.0")


def missing() -> Job:
    """A peer that is not installed."""
    import package_that_does_not_exist

    return package_that_does_not_exist.job()
