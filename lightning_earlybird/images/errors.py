"""The one error of image data."""


class ImageDataError(ValueError):
    """Image data are missing, incomplete, damaged or not what was asked for; the message says what to do."""
