"""What goes wrong with descriptors."""

from ietagc_diffusers.errors import UsageError


class DescriptorError(UsageError):
    """A descriptor that cannot be loaded; the message says what would help."""
