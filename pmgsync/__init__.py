"""pmgsync keeps several PostgreSQL servers, and the files beside them, in step."""

__version__ = "0.1.0"
