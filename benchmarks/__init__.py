"""What this project measures about itself and its peers, and how: the same work, in turn, with its spread.

`measure` times and summarises, `machine` says on what, `tables` writes CSV and Markdown. `work` is the job of a loader
benchmark, `forms` the data on disk in every system's own format, `peers` and its sisters the systems, each behind the
same small protocol, `worker` the process that one system lives in. `run` is the entry.
"""
