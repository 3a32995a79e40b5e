"""What must never lose or mix up anything, tried often. `make torture` runs it in full, `make test` a little of it."""
