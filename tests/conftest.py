"""For every test: the process is prepared as a rank's is."""

from graphs.capture import prepare_cpu_process

prepare_cpu_process()
