# syntax=docker/dockerfile:1

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
COPY . .
# The registry and the target folder live in caches that survive from one build to the next: after
# a change only what changed is compiled, whatever the crate looks like inside. They are not part of
# the image, hence the copy. The checked queries come from sqlx-data, so no database is needed here.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked \
 && cp target/release/taskwire /usr/local/bin/taskwire

FROM debian:bookworm-slim
# For a Postgres that is reached through TLS with a public certificate.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/*
# The working directory is the user's own: without DATABASE_URL the server would keep a Postgres in
# it, and an operator's .env may be mounted there.
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/taskwire --shell /usr/sbin/nologin taskwire
WORKDIR /var/lib/taskwire
COPY --from=build /usr/local/bin/taskwire /usr/local/bin/taskwire
USER taskwire

ENV TASKWIRE_BIND=0.0.0.0:8000
EXPOSE 8000
# Asks whether the process lives, not whether it is ready: a restart would not bring a missing
# Postgres back, and would cut every stream. bash is in the image already and can open a socket.
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 CMD ["bash", "-c", \
    "exec 3<>/dev/tcp/127.0.0.1/${TASKWIRE_BIND##*:} && printf 'GET /healthz HTTP/1.0\\r\\n\\r\\n' >&3 && read -r _ status _ <&3 && [ \"$status\" = 200 ]"]
# The server is process 1 and handles SIGTERM itself: it drains, and ends within 12 s.
ENTRYPOINT ["taskwire"]
CMD ["serve"]
