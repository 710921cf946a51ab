"""``teacher.placement=separate``: teachers on ranks of their own, in the students' job.

``roles`` splits the job, ``meeting`` lets the two sides learn of each other, ``student`` asks, ``serving`` answers, and all of it
goes over the ``bridge``. A teacher scores one micro-batch while the students train on another.
"""
