-- Run once, when the database is made. Makes a role for each part of Maskwatch, a login that is a member of that role,
-- and the migrator, which owns the database. `maskwatch db upgrade` grants each role its rights.
\set migrator `cat "${SECRETS_DIR:-/run/secrets}/migrator_password"`
\set producer `cat "${SECRETS_DIR:-/run/secrets}/producer_password"`
\set worker `cat "${SECRETS_DIR:-/run/secrets}/worker_password"`
\set aggregator `cat "${SECRETS_DIR:-/run/secrets}/aggregator_password"`
\set analyst `cat "${SECRETS_DIR:-/run/secrets}/analyst_password"`

CREATE ROLE maskwatch_producer NOLOGIN;
CREATE ROLE maskwatch_worker NOLOGIN;
CREATE ROLE maskwatch_aggregator NOLOGIN;
CREATE ROLE maskwatch_analyst NOLOGIN;
CREATE ROLE migrator LOGIN PASSWORD :'migrator';
CREATE ROLE producer LOGIN PASSWORD :'producer' IN ROLE maskwatch_producer;
CREATE ROLE worker LOGIN PASSWORD :'worker' IN ROLE maskwatch_worker;
CREATE ROLE aggregator LOGIN PASSWORD :'aggregator' IN ROLE maskwatch_aggregator;
CREATE ROLE analyst LOGIN PASSWORD :'analyst' IN ROLE maskwatch_analyst;
-- A dashboard's query that takes too long is cancelled, so that it can't slow down the work.
ALTER ROLE analyst SET statement_timeout = '30s';
ALTER DATABASE :"DBNAME" OWNER TO migrator;
