"""`python -m common.ledger` prints the tables of docs/ledger.md."""

from common.ledger.states import as_markdown

print(as_markdown(), end="")
