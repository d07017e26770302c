"""`bench trajectories`: recorded runs of agents replayed request by request, and what memory made of them."""
