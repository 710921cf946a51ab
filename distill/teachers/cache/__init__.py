"""Teachers that have spoken: their scores of a text in a folder, filled once and read by any number of runs.

    distill rollout method=off_policy model.teacher.path=TEACHER teacher.signal=hidden teacher.cache=FOLDER --save
    distill train method=off_policy teacher.placement=cache teacher.signal=hidden teacher.cache=FOLDER

``keys`` says what a sequence is called, ``layout`` and ``shard`` how it lies on the disk, ``index`` what the folder says of itself;
``folder``, ``repair`` and ``filling`` fill it, ``reader`` and ``scorer`` use it.
"""
