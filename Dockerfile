# One image for every role and for the command `notify`. EXTRAS=msk adds what Amazon MSK's IAM authentication needs.
#
#   docker build --tag flowmart-notifications:0.1.0 .
#   docker run --init --read-only --tmpfs /tmp --env NOTIFY_ROLE=router … flowmart-notifications:0.1.0
#
# `--init`: Faust stops in order on SIGTERM, but as PID 1 it would not hear one while it still imports.

FROM python:3.11.14-slim-bookworm AS build
ARG EXTRAS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY pyproject.toml requirements.txt deploy/runtime_requirements.py ./
# every package as the lock has it, checked by hash; wheels only, so no compiler is needed
RUN python runtime_requirements.py $EXTRAS > runtime.txt \
 && python -m venv /opt/notify \
 && /opt/notify/bin/pip install --require-hashes --only-binary :all: --requirement runtime.txt
COPY .ci/link_project.py ./
COPY schemas /app/schemas
COPY templates /app/templates
COPY channels /app/channels
COPY agents /app/agents
COPY streams /app/streams
COPY deploy/healthy.py /app/deploy/healthy.py
# the command `notify`; then pip goes, and what is imported is compiled, since nothing can be written later
RUN /opt/notify/bin/python link_project.py /app \
 && /opt/notify/bin/pip uninstall --yes pip setuptools \
 && /opt/notify/bin/python -m compileall -q -j 0 /app /opt/notify/lib

FROM python:3.11.14-slim-bookworm
LABEL org.opencontainers.image.title="FlowMart notifications" org.opencontainers.image.version="0.1.0"
RUN pip uninstall --yes pip setuptools wheel \
 && groupadd --gid 10001 notify \
 && useradd --uid 10001 --gid notify --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin notify \
 && install --directory --owner=notify --group=notify /var/lib/notify /var/lib/objects
COPY --from=build /opt/notify /opt/notify
COPY --from=build /app /app
ENV PATH=/opt/notify/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 NOTIFY_DATA_DIR=/var/lib/notify
WORKDIR /var/lib/notify
USER 10001:10001
VOLUME /var/lib/notify
EXPOSE 6066
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=90s --retries=3 CMD ["python", "/app/deploy/healthy.py"]
CMD ["faust", "-A", "streams.app", "worker", "-l", "info"]
