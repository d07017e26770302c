"""Multi-step tasks for the scripted agent: environment, policy, and four passes over them."""
