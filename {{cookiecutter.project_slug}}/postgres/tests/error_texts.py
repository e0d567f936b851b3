"""What servers, proxies and libpq say when a connection fails, and what it means.

Sources: the code of Neon's proxy, PgBouncer, Pgpool-II, Supavisor, PgCat, PgDog, Odyssey,
PostgreSQL and OpenSSL; the documentation of Neon, RDS, Azure and Cloud SQL; public reports. The
texts are shortened.
"""

# A source after "#", and below it what it says: the finding, whether to try again, the text
TABLE = r"""
# Neon
tls-required | no | connection is insecure (try using `sslmode=require`)
endpoint-missing | no | Endpoint ID is not specified. Either please upgrade …
endpoint-missing | no | Common name inferred from SNI ('db.test') is not known
endpoint-missing | no | Project name ('a b') must contain only alphanumeric …
endpoint-mismatch | no | Inconsistent project name inferred from SNI ('ep-a') and …
login-refused | no | password authentication failed for user 'ada'
login-refused | no | Malformed password message: …
channel-binding-unsupported | no | unsupported channel binding method y
login-method-unsupported | no | Unsupported authentication method: md5
address-not-allowed | no | This IP address 203.0.113.7 is not allowed to connect to …
address-not-allowed | no | This connection … from a blocked network.
address-not-allowed | no | VPC endpoint ID is not specified. This …
address-not-allowed | no | This VPC endpoint id vpce-1 is not allowed …
connect-storm | yes, with jitter | Too many connections to this endpoint.
connect-storm | yes, with jitter | Too many connections attempts
connect-storm | yes, with jitter | Failed to acquire permit to connect to the database. …
no-answer | yes | Authentication timed out
connection-lost | yes | Disconnected due to inactivity after 2m.
waking-up | yes | Couldn't connect to compute node
waking-up | yes | Internal error
connection-lost | yes | error communicating with the server: …
connection-lost | yes | connection closed
startup-parameter-refused | no | unsupported startup parameter in options: statement_timeout. …
waking-up | yes | Control plane request failed
endpoint-disabled | no | Control plane request failed: endpoint is disabled
endpoint-deleted | no | Control plane request failed: endpoint cannot be found
endpoint-unavailable | once slowly | Control plane request failed: endpoint is temporarily …
waking-up | yes | Console request failed
endpoint-unavailable | once slowly | Console request failed: endpoint is temporary unavailable
endpoint-unavailable | once slowly | Access to this endpoint is temporarily disabled
endpoint-disabled | no | The endpoint has been disabled. Enable it using Neon API and retry.
too-many-endpoints | no | You have exceeded the limit of concurrently active endpoints. …
too-many-endpoints | no | active endpoints limit exceeded
endpoint-deleted | no | The requested endpoint could not be found, or you …
endpoint-deleted | no | The requested branch could not be found, or you …
waking-up | yes | The request could not be authorized due to an internal error
role-missing | no | The role you're attempting to use is protected and …
connect-storm | yes, with jitter | You've exceeded the rate limit. Please …
waking-up | yes | Your project already has running operations. Please …
quota-exceeded | no | Your account or project has exceeded the compute time quota. …
quota-exceeded | no | Your project has exceeded the data transfer quota. …
quota-exceeded | no | Your account or project has exceeded the quota. …
quota-exceeded | no | You've exceeded the compute time for this branch. …
disk-full | no | could not extend file because project size limit …
server-full | yes | Failed to connect to the compute node: … sorry, too many clients already
waking-up | yes | Failed to connect to the compute node
waking-up | yes | [NEON_SMGR] [shard 0] could not establish connection to pageserver
waking-up | yes | could not read block 7 … from page server …
# PostgreSQL
login-refused | no | password authentication failed for user "ada"
password-missing | no | empty password returned by client
peer-refused | no | Peer authentication failed for user "ada"
peer-refused | no | Ident authentication failed for user "ada"
client-certificate-refused | no | certificate authentication failed for user "ada"
client-certificate-refused | no | connection requires a valid client certificate
not-admitted | no | no pg_hba.conf entry for host "203.0.113.7", …, no encryption
database-missing | no | database "todo" does not exist
role-missing | no | role "ada" does not exist
database-closed | no | database "todo" is not currently accepting connections
database-closed | no | cannot connect to invalid database "todo"
role-missing | no | role "database" does not exist
role-missing | no | role "ada" is not permitted to log in
permission-denied | no | permission denied for database "todo"
startup-parameter-refused | no | permission denied to set parameter …
startup-parameter-refused | no | unrecognized configuration parameter …
startup-parameter-refused | no | invalid value for parameter "TimeZone"
startup-parameter-refused | no | invalid command-line argument for …
startup-parameter-refused | no | parameter "max_connections" cannot be changed without …
server-full | yes | remaining connection slots are reserved for roles with the SUPERUSER attribute
server-full | yes | sorry, too many clients already
server-full | yes | too many connections for role "ada"
server-full | yes | too many connections for database "todo"
server-starting | yes | the database system is starting up
server-starting | yes | the database system is not accepting connections
server-starting | yes | must be superuser to connect in binary upgrade mode
server-stopped | yes | terminating connection due to administrator command
server-crashed | yes | terminating connection because of crash of another server process
server-crashed | yes | terminating connection due to unexpected postmaster exit
connection-lost | yes | terminating connection due to conflict …
connection-lost | yes | terminating connection due to idle-session …
connection-lost | yes | terminating connection due to transaction timeout
no-answer | yes | canceling authentication due to timeout
out-of-memory | back off | out of memory
out-of-memory | back off | could not fork new process for connection: …
out-of-memory | back off | could not open "…": Cannot allocate memory
too-many-files | back off | could not open file "…": Too many open files in system
disk-full | no | could not write init file "…": No space left on device
not-postgresql | no | unsupported frontend protocol 1234.5680: …
server-refused | no | could not open file "…": No such file or directory
server-refused | no | the flux capacitor is out of tune
# PgBouncer
tls-required | no | SSL required
pooler-full | back off | no more connections allowed (max_client_conn)
pooler-full | back off | client connections exceeded (max_user_client_connections)
pooler-full | back off | bouncer resources exhaustion
pooler-full | back off | no memory for pool
server-refused | no | bouncer config error
database-missing | no | no such database: todo
role-missing | no | no such user
login-refused | no | password authentication failed
login-refused | no | SASL authentication failed
login-refused | no | "trust" authentication failed
login-refused | no | auth failed
login-refused | no | username too long
login-refused | no | password too long
gssapi-failed | no | GSSAPI authentication failed for user "ada"
client-certificate-refused | no | certificate authentication failed
login-method-unsupported | no | client selected an invalid SASL authentication mechanism
peer-refused | no | unix socket login rejected
not-admitted | no | login rejected
not-admitted | no | no authentication method is found
endpoint-disabled | no | database "todo" is disabled
connection-lost | yes | database removed
startup-parameter-refused | no | unsupported startup parameter: options
startup-parameter-refused | no | unsupported startup parameter in options: statement_timeout
startup-parameter-refused | no | invalid server parameter
pooler-mode-unsupported | no | transaction blocks not allowed in statement pooling mode
pooler-waits | yes | query_wait_timeout
query-cancelled | no | query_timeout
query-cancelled | no | transaction timeout
no-answer | yes | client_login_timeout
pooler-waits | yes | client_login_timeout (server down)
connection-lost | yes | client_idle_timeout
connection-lost | yes | idle transaction timeout
connection-lost | yes | suspend_timeout
connection-lost | yes | server conn crashed?
connection-lost | yes | admin forced disconnect
connection-lost | yes | database configuration changed
connection-lost | yes | server lifetime over
connection-lost | yes | server idle timeout
endpoint-disabled | no | authentication database "auth" is disabled
pooler-waits | yes | pgbouncer cannot connect to server
pooler-waits | yes | server login has been failing, cached error: connect timeout (…)
pooler-waits | yes | server login has been failing, cached error: server refused SSL (…)
pooler-waits | yes | server login failed: wrong password type
server-starting | yes | server shutting down
server-starting | yes | pooler is shut down
pooler-waits | yes | server login has been failing, try again later (server_login_retry)
pooler-waits | yes | server login has been failing, cached error: connect failed (…)
pooler-waits | yes | server login has been failing, cached error: server conn crashed? (…)
pooler-waits | yes | server login has been failing, cached error: connection refused (…)
database-missing | no | server login has been failing, cached error: database "todo" does not exist
login-refused | no | server login failed: FATAL password authentication failed for user "ada"
# Pgpool-II
pooler-waits | yes | pgpool is not accepting any new connections
pooler-waits | yes | all backend nodes are down, pgpool requires …
# Supavisor
tls-required | no | SSL connection is required
endpoint-deleted | no | Tenant or user not found
endpoint-deleted | no | (ENOTFOUND) tenant/user ada.ref not found
endpoint-missing | no | (ENOIDENTIFIER) no tenant identifier provided …
endpoint-disabled | no | (EBANNED) tenant is banned: …
address-not-allowed | no | (EADDRNOTALLOWED) address not in tenant allow_list
login-refused | no | Authentication error, reason: "Invalid format …"
login-blocked | no | (ECIRCUITBREAKER) Too many authentication errors
login-blocked | no | (ECIRCUITBREAKER) too many authentication failures, new connections are …
pooler-waits | yes | (ECIRCUITBREAKER) Unable … upstream database
pooler-waits | yes | (ECIRCUITBREAKER) … database credentials
pooler-waits | yes | (EAUTHQUERY) auth_query connection failed
pooler-waits | yes | (EAUTHQUERY) authentication query failed: …
pooler-waits | yes | (EJITREQUESTFAILED) failed to reach JIT provider for user "ada"
role-missing | no | (EAUTHQUERY) user not found in the database
pooler-full | back off | Max client connections reached
pooler-full | back off | (EMAXCONNSESSION) max clients reached …
pooler-full | back off | Max pools count reached
pooler-full | back off | (EMAXPROXYCONN) max proxy connections reached, limit: 5
pooler-waits | yes | (ECHECKOUTTIMEOUT) Pool checkout timeout. …
pooler-waits | yes | Unable to check out process from the pool due to …
pooler-waits | yes | (ECHECKOUTRETRIES) failed to check out a connection after …
pooler-waits | yes | Failed to connect to database: {:error, :econnrefused}
pooler-waits | yes | Failed to subscribe to tenant after multiple …
connection-lost | yes | connection to database closed. Check logs
connection-lost | yes | DbHandler exited. Check logs
no-answer | yes | timeout while waiting for message
waking-up | yes | Internal error (auth): …
# PgCat
database-missing | no | No pool configured for database: "todo"
pooler-waits | yes | Pool down for database: "todo", user: "ada"
pooler-waits | yes | could not get connection from the pool - AllServersDown
connection-lost | yes | error receiving data from server: SocketError(…)
query-cancelled | no | pool statement timeout
# pg_doorman
not-admitted | no | … is not permitted by HBA configuration.
# PgDog
tls-required | no | Clients must connect with TLS
login-refused | no | password for user "ada" … is wrong, or the database does not exist
no-answer | yes | client login timeout
no-answer | yes | pool: connect timeout
connection-lost | yes | disconnecting idle client
server-starting | yes | PgDog is shutting down
pooler-waits | yes | connection pool for user "ada" and database "todo" is down
pooler-waits | yes | pool: checkout timeout
pooler-waits | yes | pool is not healthy
pooler-waits | yes | all replicas down
pooler-waits | yes | no primary
# Odyssey
tls-required | no | odyssey: c1f: SSL is required
server-full | yes | odyssey: c1f: too many connections
pooler-full | back off | odyssey: c1f: too many client tcp connections (…)
pooler-full | back off | odyssey: c1f: too many active clients for user …
pooler-waits | yes | odyssey: c1f: failed to get remote server connection
pooler-waits | yes | odyssey: c1f: failed to connect to remote server s2
connection-lost | yes | odyssey: c1f: remote server read/write error s2: …
database-missing | no | odyssey: c1f: route for 'todo.ada' is not found
not-admitted | no | odyssey: c1f: host based authentication rejected
login-refused | no | odyssey: c1f: incorrect password
login-refused | no | odyssey: c1f: incorrect user
login-refused | no | odyssey: c1f: bad password message
login-refused | no | odyssey: c1f: invalid user password or SCRAM secret, …
pooler-waits | yes | odyssey: c1f: failed to make auth query
pooler-waits | yes | odyssey: c1f: client routing failed
server-refused | no | odyssey: c1f: bad startup packet
server-starting | yes | odyssey: c1f: Odyssey is gracefully shutting down
out-of-memory | back off | odyssey: c1f: soft out of memory
# RDS
login-refused | no | PAM authentication failed for user "ada"
# RDS Proxy
tls-required | no | This RDS Proxy requires TLS connections.
tls-required | no | IAM is allowed only with SSL connections.
login-refused | no | IAM authentication failed for user ada. Check …
login-refused | no | The password … for the role ada is wrong.
role-missing | no | This RDS proxy has no credentials for the role ada. …
login-method-unsupported | no | RDS supports only IAM or MD5 …
startup-parameter-refused | no | … doesn't support the option x.
startup-parameter-refused | no | … doesn't support command-line options.
connect-storm | yes, with jitter | The IAM authentication failed because of … competing requests.
connect-storm | yes, with jitter | Rate of connection to proxy exceeded 5.
pooler-full | back off | The maximum number of client connections to the proxy exceeded 5.
pooler-waits | yes | Timed-out waiting to acquire database connection.
database-missing | no | Request returned an error: database "todo" does not exist
# Aurora DSQL
endpoint-missing | no | unable to accept connection, sni was not received
login-refused | no | unable to accept connection, access denied
# Azure
tls-required | no | SSL connection is required. Please specify SSL options and retry.
endpoint-missing | no | Invalid Username specified. Please check the Username and …
address-not-allowed | no | Client from Azure Virtual Networks is not allowed to access the server
address-not-allowed | no | The public network access on this server is disabled. Use the Private …
login-refused | no | Azure AD access token not valid for role ada (does not contain …)
login-refused | no | The access token has expired. Acquire a new token and retry.
# Cloud SQL
login-refused | no | Cloud SQL IAM user authentication failed for user …
login-refused | no | Cloud SQL IAM service account authentication failed for user …
# PlanetScale
read-only | no | pg_readonly: invalid statement because cluster is read-only.
# Prisma Postgres
quota-exceeded | no | Failed to identify your database: … planLimitReached. …
pooler-waits | yes | Failed to connect to upstream database. …
# Render
tls-required | no | SSL/TLS required
# libpq 13, Linux
read-only | no | could not make a writable connection to server "db:5432"
nothing-listens | no | could not connect to server: Connection refused\n\tIs the server …
nothing-listens | no | could not connect to server: No such file or directory\n\tIs …
server-refused | no | FATAL:  the flux capacitor is out of tune
login-refused | no | FATAL:  password authentication failed for user "ada"\nFATAL:  SSL required
connection-lost | yes | SSL SYSCALL error: Bad address\nFATAL:  no pg_hba.conf entry …, SSL off
# libpq 14, macOS
nothing-listens | no | connection to server on socket "/tmp/…" failed: No such file or directory
host-unknown | once | could not translate host name "db" to address: nodename nor servname …
# libpq 17, Windows
nothing-listens | no | connection to server at "db", port 5432 failed: … (0x0000274D/10061)
connection-forbidden | no | connection to server at "db", port 5432 failed: … (0x0000271D/10013)
network-unreachable | once | connection to server at "db", port 5432 failed: … (0x0000273F/10047)
network-unreachable | once | connection to server at "db", port 5432 failed: … (0x00002743/10051)
network-unreachable | once | connection to server at "db", port 5432 failed: … (0x00002751/10065)
no-answer | yes | connection to server at "db", port 5432 failed: … (0x0000274C/10060)
connection-lost | yes | connection to server at "db", port 5432 failed: … (0x00002746/10054)
too-many-files | back off | could not create socket: … (0x00002728/10024)
too-many-files | back off | connection to server at "db", port 5432 failed: … (0x00002747/10055)
# libpq 17, Linux
connection-forbidden | no | connection to server on socket "/run/…" failed: Permission denied
connection-forbidden | no | connection to server at "db", port 5432 failed: Operation not permitted
network-unreachable | once | connection to server at "db", port 5432 failed: Network is unreachable
network-unreachable | once | connection to server at "db", port 5432 failed: No route to host
network-unreachable | once | connection to server at "db" failed: Cannot assign requested address
network-unreachable | once | could not create socket: Address family not supported by protocol
too-many-files | back off | could not create socket: Too many open files
too-many-files | back off | connection to server at "db" failed: No buffer space available
connection-lost | yes | connection to server at "db" failed: Software caused connection abort
# libpq 17, musl
network-unreachable | once | connection to server at "db", port 5432 failed: Address not available
# libpq 17, macOS
network-unreachable | once | connection to server at "db", port 5432 failed: Host is down
network-unreachable | once | connection to server at "db", port 5432 failed: Network is down
no-answer | yes | connection to server at "db", port 5432 failed: Operation timed out
# libpq 17
connection-lost | yes | connection to server at "db", port 5432 failed: Connection reset by peer
no-answer | yes | connection to server at "db", port 5432 failed: timeout expired
tls-not-offered | no | server does not support SSL, but SSL was required
not-postgresql | no | received invalid response to SSL negotiation: H
not-postgresql | no | received invalid response to GSSAPI negotiation: E
not-postgresql | no | expected authentication request from server, …
out-of-memory | back off | server sent an error response during SSL exchange
password-missing | no | fe_sendauth: no password supplied
channel-binding-unsupported | no | channel binding required, but SSL not in use
channel-binding-unsupported | no | server offered SCRAM-SHA-256-PLUS authentication over a …
login-method-unsupported | no | authentication method requirement "scram-sha-256" failed: …
login-method-unsupported | no | Kerberos 5 authentication not supported
gssapi-failed | no | GSSAPI encryption required but it is not supported over a local socket
gssapi-failed | no | server doesn't support GSSAPI encryption, but it was required
gssapi-failed | no | could not initiate GSSAPI security context: No Kerberos credentials …
gssapi-failed | no | SSPI continuation error: No credentials are available
login-refused | no | error received from server in SCRAM exchange: invalid-proof
login-refused | no | incorrect server signature
read-only | no | session is read-only
target-mismatch | no | session is not read-only
target-mismatch | no | server is not in hot standby mode
read-only | no | server is in hot standby mode
# PostgreSQL 17
read-only | no | cannot execute … in a read-only transaction
# libpq 17
settings-wrong | no | invalid sslmode value: "on"
settings-wrong | no | invalid integer value "x" for connection option "…"
settings-wrong | no | invalid port number: "x"
settings-wrong | no | invalid connection option "schema"
settings-wrong | no | invalid target_session_attrs value: "master"
settings-wrong | no | could not match 2 port numbers to 3 hosts
settings-wrong | no | could not parse network address "db": Name or service not known
settings-wrong | no | sslmode value "require" invalid when SSL support is not compiled in
settings-wrong | no | requirepeer specifies "ada", but actual peer user name is "eve"
settings-wrong | no | definition of service "todo" not found
settings-wrong | no | Unix-domain socket path "…" is too long (maximum …)
# psycopg2
settings-wrong | no | invalid dsn: invalid URI query parameter: …
# libpq 17
certificate-refused | no | root certificate file "/ca.pem" does not exist
certificate-refused | no | could not load system root certificate paths: …
certificate-refused | no | could not open certificate file "/c.pem": …
certificate-refused | no | private key file "/k.pem" has group or world …
certificate-refused | no | weak sslmode … with sslrootcert=system (use …)
certificate-refused | no | server certificate for "a.test" does not match host name "b.test"
certificate-refused | no | host name must be specified for a verified SSL connection
# OpenSSL 3
certificate-refused | no | SSL error: certificate verify failed: self-signed certificate
client-certificate-refused | no | SSL error: tlsv13 alert certificate required
client-certificate-refused | no | SSL error: tlsv1 alert unknown ca
client-certificate-refused | no | SSL error: ssl/tls alert bad certificate
tls-failed | no | SSL error: tlsv1 alert protocol version
tls-failed | no | SSL error: tlsv1 alert no application protocol
tls-failed | no | SSL error: wrong version number
# libpq 17
tls-failed | no | could not create SSL context: …
tls-failed | no | direct SSL connection was established without ALPN protocol negotiation extension
connection-lost | yes | SSL connection has been closed unexpectedly
connection-lost | yes | server closed the connection unexpectedly\n\t…
connection-lost | yes | SSL SYSCALL error: EOF detected
# libpq 17, Linux
connection-lost | yes | SSL SYSCALL error: Connection timed out
# libpq 17, macOS
connection-lost | yes | SSL SYSCALL error: Undefined error: 0
# OpenSSL 3
connection-lost | yes | SSL error: unexpected eof while reading
connection-lost | yes | SSL error: decryption failed or bad record mac
connection-lost | yes | SSL error: protocol is shutdown
# libpq 17
connection-lost | yes | could not receive data from server: Connection timed out
connection-lost | yes | could not send data to server: Broken pipe
nothing-listens | no | could not send data to server: Connection refused
connection-lost | yes | no connection to the server
connection-lost | yes | connection not open
connection-lost | yes | lost synchronization with server: got message …
connection-lost | yes | message contents do not agree with length in message type "D"
connection-lost | yes | unexpected response from server; first received character was "H"
tls-failed | no | received unencrypted data after SSL response
# libpq 18
login-method-unsupported | no | server requires OAuth authentication, but oauth_client_id is not set
settings-wrong | no | server only supports protocol version 3.0, but "min_protocol_version" was …
# psycopg2
connection-lost | yes | connection already closed
connection-lost | yes | error with status PGRES_TUPLES_OK and no message from the libpq
# this app
no-answer | yes | timeout expired: the server did not answer in time
pool-exhausted | yes, with jitter | all connections are in use
pool-exhausted | yes, with jitter | too many requests wait for the database
# SQLAlchemy
pool-exhausted | yes, with jitter | QueuePool limit of size 5 …, connection timed out
# asyncio, Windows
host-unknown | once | [Errno 11001] getaddrinfo failed
# Alembic
schema-ahead | no | Can't locate revision identified by '9f'
schema-ahead | no | No such revision or branch '9f'
migrations-broken | no | The script directory has multiple heads
migrations-broken | no | Multiple head revisions are present for …
# libpq
connection-failed | no | libpq says something new
"""
