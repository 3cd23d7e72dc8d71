"""Two lifts and a chain, streamed block by block: plan, run, resume."""
