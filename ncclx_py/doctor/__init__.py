"""``ncclx doctor``: what is wrong with the nodes of a job before it starts; see docs/doctor.md.

`machine` touches the system, `facts` collects what one rank sees as plain data, `gather` brings the facts of all ranks
together over torch's store (no collective: these may be what is broken), `checks` judges them, `report` prints.
"""
