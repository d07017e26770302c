"""What it taught: pure folds from traces and feedback to outcomes and memories."""
