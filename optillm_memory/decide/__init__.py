"""Decisions: proposals and the gate, the policy over arms, the guard, the holdout."""
