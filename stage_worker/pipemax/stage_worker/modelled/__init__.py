"""How long a stage takes on a GPU that is not at hand: catalogues and a performance model.

The simulator and the modelled device share it. Nothing here imports torch."""
