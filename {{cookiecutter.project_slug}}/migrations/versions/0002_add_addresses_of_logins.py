"""Add addresses of logins.

Revision: 0002
Revises: 0001
Created: 2026-11-27
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | Sequence[str] | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("refresh_tokens", sa.Column("address", sa.String(length=64), nullable=True))
    # From now on, a login session ends 90 days after it began.
    op.execute(
        "UPDATE refresh_tokens SET expires_at = created_at + interval '90 days'"
        " WHERE expires_at > created_at + interval '90 days'"
    )


def downgrade() -> None:
    op.drop_column("refresh_tokens", "address")
