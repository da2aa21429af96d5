"""Everything that talks to PostgreSQL; the only package that imports psycopg2.

psycopg 3 beside psycopg2 was measured and left out. Rows per second with psycopg2 and with psycopg 3, rows of five
columns with one secondary index, PostgreSQL 18 (on 15 some 10 % less): COPY of our own text 357,000 and 309,000;
inserts in one prepared statement each 108,000 and 75,000 (its cursors in pipeline mode take 12 µs of Python a row, ours
1.6); updates 77,000 and 80,000. Only its raw libpq layer, `psycopg.pq`, is faster: 172,000 and 107,000, against 61,000
for updates with our check that one row was hit, which can be read from the command's tag there. But `UPDATE … FROM
unnest` reaches 115,000 with psycopg2, and COPY three times the inserts. So executing in bulk gains more, without a
second libpq, a second family of exceptions and 121 ms of import (psycopg2: 25). psycopg 3 has no replication protocol
either. What would change this: a load that has to go row by row, where `psycopg.pq` would bring a factor of 1.7.
"""
