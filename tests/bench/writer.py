"""A process that commits one row after another at a steady rate and then writes when each commit returned (monotonic).

python -m tests.bench.writer DSN FIRST COUNT PER_SECOND
"""

from __future__ import annotations

import sys
import time

from tests.bench.servers import connect


def main() -> None:
    """Write, then print."""
    dsn, first, count, per_second = sys.argv[1], *map(int, sys.argv[2:5])
    committed = []
    connection = connect(dsn)
    with connection.cursor() as cursor:
        begun = time.monotonic()
        for number in range(count):
            if (early := begun + number / per_second - time.monotonic()) > 0:
                time.sleep(early)
            cursor.execute("INSERT INTO tick VALUES (%s)", (first + number,))
            committed.append(time.monotonic())
    connection.close()
    sys.stdout.write("".join(f"{when}\n" for when in committed))


if __name__ == "__main__":
    main()
