"""Rollouts by vLLM servers (``rollout=vllm``): one for the student, one for the teacher, spoken to over HTTP with token ids.

The trainer's environment needs no vLLM. `client` speaks to a server, `checks` sees at the start that it serves what the run needs,
`processes` starts and stops servers of the run's own, `generator` and `monitored` are the counterparts of the built-in `Generator`
and `Monitored`, `weights` brings the student's weights to its server, and `engine` puts these together for a run. How to use it,
and what it needs of a server: ``docs/vllm.md``.
"""
