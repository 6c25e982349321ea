"""What sharing is: patches, adapters, plans, tasks, the model, views and ledgers (torch only)."""
