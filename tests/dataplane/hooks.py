"""A copy of the OpenResty side whose workers can be stopped, killed or watched at a chosen moment.

Why: what must hold at every single write to shared memory cannot be met by killing at random. The
copy differs from the real thing by one module that is loaded first and wraps the dicts' methods.
Nothing here asserts anything.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.dataplane.harness import HOME, Proxy, free_port, request

HOOKS = """
-- At the n-th write that a push makes to shared memory, the worker kills itself (`die`), likewise
-- with the lock of that memory held (`lock`), or stops (`stop`). Otherwise it only counts.
local ffi = require "ffi"
local shared = ngx.shared
local ctl, spy = shared.tidegate_ctl, shared.spy
local get, set, incr, delete = ctl.get, ctl.set, ctl.incr, ctl.delete
local get_phase = ngx.get_phase
pcall(ffi.cdef, "int kill(int pid, int sig);")

local function count(what, key)
    incr(spy, get_phase() .. " " .. what .. " " .. key, 1, 0)
end

local function act(dict)
    local how = get(ctl, "hook")
    if how == "lock" then
        -- nginx has the lock of a zone in the zone's first word: the pid of who holds it.
        local zone = ffi.C.ngx_http_lua_ffi_shdict_udata_to_zone(dict[1])
        local memory = ffi.cast("uintptr_t *", zone)[1]
        ffi.cast("volatile uintptr_t *", memory)[0] = ngx.worker.pid()
    end
    ffi.C.kill(ngx.worker.pid(), how == "stop" and 19 or 9)
end

for _, name in ipairs({ "ctl", "ptr", "dat", "probes" }) do
    local dict = shared["tidegate_" .. name]
    for _, method in ipairs({ "add", "delete", "incr", "safe_add", "safe_set", "set" }) do
        local original = dict[method]
        rawset(dict, method, function(self, key, value, ...)
            if get_phase() == "content" and get(ctl, "hook_at")
                    and incr(ctl, "hook_at", -1) == 0 then
                delete(ctl, "hook_at")
                act(dict)
            end
            count(method, name)
            if type(value) == "string" and #value > (get(spy, "largest") or 0) then
                set(spy, "largest", #value)
            end
            return original(self, key, value, ...)
        end)
    end
    for _, method in ipairs({ "get", "get_keys", "flush_all", "flush_expired" }) do
        local original = dict[method]
        rawset(dict, method, function(...)
            count(method, name)
            return original(...)
        end)
    end
end
for _, method in ipairs({ "find", "gmatch", "gsub", "match" }) do
    local original = string[method]
    string[method] = function(...)
        count(method, "string")
        return original(...)
    end
end
local index = getmetatable(ngx).__index
getmetatable(ngx).__index = function(self, key)
    if key == "ctx" then
        count("get", "ngx.ctx")
    end
    return index(self, key)
end

return {
    arm = function(number, how)
        set(ctl, "hook", how)
        set(ctl, "hook_at", number)
    end,
    disarm = function()
        local left = get(ctl, "hook_at")
        delete(ctl, "hook_at")
        return left ~= nil
    end,
    seen = function()
        local found = {}
        for _, key in ipairs(spy:get_keys(0)) do
            found[key] = get(spy, key)
        end
        spy:flush_all()
        return found
    end,
}
"""
SERVER = """
lua_shared_dict spy 4m;
server {{
    listen 127.0.0.1:{port};
    client_body_buffer_size 1m;
    location / {{
        content_by_lua_block {{
            ngx.req.read_body()
            local code = assert(loadstring(ngx.req.get_body_data()))
            ngx.print(require("cjson").encode({{ result = code() }}))
        }}
    }}
}}
"""


class Hooked:
    """A running proxy with the hooks."""

    def __init__(
        self, make_proxy: Callable[..., Proxy], directory: Path, **options: object
    ) -> None:
        home = Path(shutil.copytree(HOME, directory / "home"))
        (home / "lua/tidegate/hooks.lua").write_text(HOOKS)
        first = home / "lua/tidegate/init.lua"
        first.write_text('require "tidegate.hooks"\n' + first.read_text())
        self._port = free_port()
        self.proxy = make_proxy(home=home, **options)
        conf = Path(self.proxy.env["TIDEGATE_CONF_DIR"])
        conf.mkdir(parents=True)
        (conf / "hooks.conf").write_text(SERVER.format(port=self._port))
        self.proxy.start()

    def run(self, code: str) -> Any:
        """What Lua `code` returns in one of the workers; nothing where that is nil."""
        answer = request(self._port, method="POST", body=code.encode())
        assert answer.status == 200, self.proxy.output[-2000:]
        return answer.json().get("result")

    def arm(self, at: int, how: str) -> None:
        """Has the worker that makes write number `at` of the next push `die`, `lock` or `stop`."""
        self.run(f'require("tidegate.hooks").arm({at}, "{how}")')

    def survived(self) -> bool:
        """Whether the push made fewer writes than it was armed for."""
        return bool(self.run('return require("tidegate.hooks").disarm()'))

    def seen(self) -> dict[str, int]:
        """How often what was called since the last time, by `PHASE METHOD DICT`."""
        found: dict[str, int] = self.run('return require("tidegate.hooks").seen()')
        return dict(found)
