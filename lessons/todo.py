"""What a task raises that is not started yet."""


class TODO(Exception):
    """Raised by the stub of a task: reported as "not started", never as a failure.

    number  of the task, such as "03.2"
    """

    def __init__(self, number: str):
        super().__init__(number)
        self.number = number
