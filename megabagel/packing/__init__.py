"""From samples to a PackPlan: plain integer tables that say how one packed sequence is laid out."""
