"""Keys of evaluation: which kept column names the user, whose rows are not independent of each other."""

from features.schema.schema import Schema

USER_COLUMNS = ("user_id", "user", "uid")


def cluster_column(schema: Schema) -> str | None:
    """The kept column that names the user: the users of histories, then user_id, user, uid; None where none is kept.

    The first of them that is kept counts. A dataset has its values in the column `features.schema.kept.kept_column(NAME)`.
    """
    users = [history.user for history in schema.histories.values()]
    return next((name for name in [*users, *USER_COLUMNS] if name in schema.keep), None)
