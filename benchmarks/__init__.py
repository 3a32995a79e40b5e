"""What this project measures about itself and its peers, and how: the same work, in turn, with its spread.

`run` is the entry; each benchmark has a file with its name, its subcommand and its page. `options` has the settings of
the command line, `measure` times and summarises, `machine` describes the machine, `worker` is the process of one
system, `tables` writes CSV and Markdown, `targets` compares with the targets, and `pages` makes the page of a
benchmark. `datasets` has the job that all systems get and its images on disk, `peers` the loaders. `gpu_check` runs
`checks` of the engines and `trainings` on a GPU, and `evidence` shows what it found.
"""
