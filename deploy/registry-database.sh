# Run once by PostgreSQL's image, on an empty volume: the registry has a database and a user of its own.
psql --set=ON_ERROR_STOP=1 --set=password="$REGISTRY_POSTGRES_PASSWORD" --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" <<'SQL'
CREATE ROLE registry LOGIN PASSWORD :'password';
CREATE DATABASE registry OWNER registry;
REVOKE CONNECT ON DATABASE registry, notify FROM PUBLIC;
SQL
