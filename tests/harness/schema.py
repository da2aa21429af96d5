"""The tables that most clusters under test have."""

from __future__ import annotations

ACCOUNTS = 40
START_BALANCE = 1000
SIMPLE = "CREATE TABLE t (id int PRIMARY KEY, v text);"
BANK_SCHEMA = f"""
CREATE TABLE account (id int PRIMARY KEY, balance bigint NOT NULL);
INSERT INTO account SELECT n, {START_BALANCE} FROM generate_series(1, {ACCOUNTS}) AS n;
CREATE TABLE marker (id bigint PRIMARY KEY, payload text NOT NULL);
CREATE TABLE loose (a int, b text);
"""
BANK_TABLES = ("account", "marker", "loose")
TOTAL = ACCOUNTS * START_BALANCE
STANDARD = SIMPLE + BANK_SCHEMA
"""Both. A cluster with these tables is copied from one that was made before (`template`), which is much faster."""
