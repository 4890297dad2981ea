# syntax=docker/dockerfile:1
# dynamollm's image: `docker build -t dynamollm .`; docker-compose.yml runs the gateway, the controller and the
# emulated cluster from it. Packages come from deploy/requirements.lock, by hash.

FROM python:3.11.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/dynamollm
WORKDIR /src
# The packages first: they change seldom, and the layer is kept.
COPY deploy/requirements.lock ./
RUN /opt/dynamollm/bin/pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY benchmarks benchmarks
COPY dynamollm dynamollm
COPY energy energy
COPY pools pools
COPY proxy proxy
COPY simulator simulator
COPY solver solver
RUN /opt/dynamollm/bin/pip install --no-deps . \
  && /opt/dynamollm/bin/dynamollm --version

FROM python:3.11.11-slim-bookworm AS runtime
LABEL org.opencontainers.image.title="dynamollm" org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/dynamollm dynamollm
COPY --from=build /opt/dynamollm /opt/dynamollm
ENV PATH=/opt/dynamollm/bin:$PATH PYTHONUNBUFFERED=1 DYNAMOLLM_CACHE=/tmp/dynamollm
USER 10001:10001
WORKDIR /var/lib/dynamollm
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=2)"]
# SIGTERM drains: open streams get their grace before the process ends.
STOPSIGNAL SIGTERM
ENTRYPOINT ["dynamollm"]
CMD ["serve", "--host", "0.0.0.0"]
