"""torchair converts without CANN in this process."""

from stand_in import ge

ge.offline()
