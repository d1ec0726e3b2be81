@echo off
rem Checks this machine with the kit in this folder, offline. Needs Python @PYTHONS@, no pip and no venv.
rem It writes into this folder only. set PYTHON=C:\path\python.exe names the one to use.
setlocal
cd /d "%~dp0"
if defined PYTHON (
    "%PYTHON%" -I check.py %*
    exit /b %errorlevel%
)
for %%v in (@PYTHONS@) do (
    py -%%v -c "" >nul 2>&1 && (
        py -%%v -I check.py %*
        exit /b
    )
)
python -c "" >nul 2>&1 && (
    python -I check.py %*
    exit /b
)
echo check.bat: no Python was found: install one of Python @PYTHONS@ from python.org >&2
exit /b 1
