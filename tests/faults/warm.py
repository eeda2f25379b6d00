"""Imported once by the server that `forked` forks from: makes a method, so that all that is imported on the way is there for every run."""

from tests import small

small.prepared("fast")
