"""How the planner's time model was fitted to published results, and the projections of docs/scaling.md made with it."""
