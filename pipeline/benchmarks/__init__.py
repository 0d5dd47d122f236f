"""What jobs/benchmark.py measures: ours against what people would otherwise run, and against what the machine can do."""

from pipeline.threads import wait_briefly

# As the jobs that are measured; OpenMP asks when it is loaded, with torch, which the modules here import.
wait_briefly()
