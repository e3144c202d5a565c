"""`pipemax simulate` and `pipemax plan`: the shipped cores on modelled hardware.

`catalogue` reads the data files of GPUs and models, `roofline` is the performance model and the
closed form of what offloading gains, `workload` makes requests, `engine` is the virtual clock,
`world` puts the coordinator's and the daemon's cores between modelled stages and links, `faults`
breaks them at given times, `report` and `gantt` show what came out.
"""
