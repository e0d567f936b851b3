-- A database of version 0.1.0: what its migration 0001, and then its API, wrote. Never change it.
-- One account, ada@example.com, with the password "correct horse" and a login session; three tasks.

CREATE EXTENSION IF NOT EXISTS btree_gin;

CREATE EXTENSION IF NOT EXISTS pg_trgm;

CREATE TYPE task_priority AS ENUM (
    'low',
    'medium',
    'high'
);

CREATE TABLE alembic_version (
    version_num character varying(32) NOT NULL
);

CREATE TABLE refresh_tokens (
    id uuid NOT NULL,
    user_id uuid NOT NULL,
    token_hash bytea NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    replaced_at timestamp with time zone,
    created_at timestamp with time zone DEFAULT now() NOT NULL
);

CREATE TABLE tasks (
    id uuid NOT NULL,
    owner_id character varying(255) NOT NULL,
    title character varying(200) NOT NULL,
    description character varying(5000),
    completed boolean DEFAULT false NOT NULL,
    "order" integer,
    priority task_priority DEFAULT 'medium'::task_priority NOT NULL,
    due_at timestamp with time zone,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    updated_at timestamp with time zone DEFAULT now() NOT NULL
);

CREATE TABLE users (
    id uuid NOT NULL,
    email character varying(254) NOT NULL,
    password_hash character varying(255) NOT NULL,
    name character varying(100) NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL
);

INSERT INTO alembic_version (version_num)
    VALUES ('0001');

INSERT INTO refresh_tokens (id, user_id, token_hash, expires_at, replaced_at, created_at)
    VALUES ('df458025-c1b2-47f2-a11f-a086597c9269', '01a21db0-abf8-77c8-96e2-1005812ed509',
        '\x4a06917bcfa3eae88715b34d8288bc55c387f8662573ca607a6cc57df1b88d8c', now() + interval '30 days', NULL, now());

INSERT INTO tasks (id, owner_id, title, description, completed, "order", priority, due_at, created_at, updated_at)
    VALUES ('01a21db0-b062-7153-b805-4c8b595567b3', '01a21db0-abf8-77c8-96e2-1005812ed509', 'Buy milk', NULL, false, NULL, 'high', NULL, '2026-11-27 15:47:28.485974+00', '2026-11-27 15:47:28.485974+00');
INSERT INTO tasks (id, owner_id, title, description, completed, "order", priority, due_at, created_at, updated_at)
    VALUES ('01a21db0-b0a4-7561-92db-d7366a3e3f01', '01a21db0-abf8-77c8-96e2-1005812ed509', '買い物', 'größe', true, 3, 'medium', '2030-01-31 10:00:00+00', '2026-11-27 15:47:28.574019+00', '2026-11-27 15:47:28.574019+00');
INSERT INTO tasks (id, owner_id, title, description, completed, "order", priority, due_at, created_at, updated_at)
    VALUES ('01a21db0-b100-76a5-af81-d30ea616d134', '01a21db0-abf8-77c8-96e2-1005812ed509', ' ', NULL, false, NULL, 'medium', NULL, '2026-11-27 15:47:28.662319+00', '2026-11-27 15:47:28.662319+00');

INSERT INTO users (id, email, password_hash, name, created_at)
    VALUES ('01a21db0-abf8-77c8-96e2-1005812ed509', 'ada@example.com',
        '$argon2id$v=19$m=19456,t=2,p=1$d+B+8RcHDsL1DbRT7ZnlNA$lOr/765AoBeHsmFs21rkFkVwQVWYvG5+McjMvi1vKrw', 'Ada', '2026-11-27 15:47:27.406247+00');

ALTER TABLE ONLY alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);

ALTER TABLE ONLY refresh_tokens
    ADD CONSTRAINT pk_refresh_tokens PRIMARY KEY (id);

ALTER TABLE ONLY tasks
    ADD CONSTRAINT pk_tasks PRIMARY KEY (id);

ALTER TABLE ONLY users
    ADD CONSTRAINT pk_users PRIMARY KEY (id);

CREATE INDEX ix_refresh_tokens_user_id ON refresh_tokens USING btree (user_id);

CREATE INDEX ix_tasks_completed ON tasks USING btree (owner_id, completed, created_at, id);

CREATE INDEX ix_tasks_created ON tasks USING btree (owner_id, created_at, id);

CREATE INDEX ix_tasks_due ON tasks USING btree (owner_id, COALESCE(due_at, 'infinity'::timestamp with time zone), id);

CREATE INDEX ix_tasks_order ON tasks USING btree (owner_id, COALESCE("order", 2147483647), id);

CREATE INDEX ix_tasks_priority ON tasks USING btree (owner_id, priority, created_at, id);

CREATE INDEX ix_tasks_text ON tasks USING gin (owner_id, title gin_trgm_ops, description gin_trgm_ops);

CREATE UNIQUE INDEX ix_users_email ON users USING btree (email);

ALTER TABLE ONLY refresh_tokens
    ADD CONSTRAINT fk_refresh_tokens_user_id_users FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE;
