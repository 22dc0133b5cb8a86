# The backend of the tests: what it does is written at the head of app.py.
FROM tidegate-test/python-base
COPY app.py /app.py
EXPOSE 8080
# Exec form and no site-packages: the server is PID 1, gets SIGTERM itself, and starts fast.
CMD ["python3", "-S", "-E", "-u", "/app.py"]
