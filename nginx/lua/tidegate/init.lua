--- What happens when nginx loads a configuration, starts a worker and ends one.

local api = require "tidegate.api"
local balancer = require "tidegate.balancer"
local bridge = require "tidegate.bridge"
local certificates = require "tidegate.certificates"
local checks = require "tidegate.checks"
local health = require "tidegate.health"
local hold = require "tidegate.hold"
local lease = require "tidegate.lease"
local limits = require "tidegate.limits"
local load = require "tidegate.load"
local metrics = require "tidegate.metrics"
local persist = require "tidegate.persist"
local posix = require "tidegate.posix"
local probe = require "tidegate.probe"
local signal = require "tidegate.signal"
local site = require "tidegate.site"
local sticky = require "tidegate.sticky"

-- For upstream blocks, which find them in package.loaded.
require "tidegate.backends"
require "tidegate.mirror"

local ctl = ngx.shared.tidegate_ctl

local every = ngx.timer.every
local floor = math.floor
local gsub = string.gsub
local ipairs = ipairs
local max = math.max
local min = math.min
local ngx = ngx
local pcall = pcall

local ERRORS = { 500, 502, 503, 504 }
-- A worker needs for itself: listeners, timers, checks, the admin API.
local OWN_CONNECTIONS = 64

local _M = { version = "0.1.0" }

local has_stream = false
local max_held


local function random_id()
    local file = io.open("/dev/urandom", "rb")
    local bytes = file:read(16)
    file:close()
    return (gsub(bytes, ".", function(c) return ("%02x"):format(c:byte()) end))
end


-- A secret from the file that the variable `name`_FILE gave, else from the variable itself.
local function read_secret(name, file)
    local secret = os.getenv(name)
    if file ~= "" then
        local text, err = posix.read(file)
        if not text then
            error(name .. "_FILE cannot be read: " .. err, 0)
        end
        secret = gsub(text, "%s+$", "")
        if secret == "" then
            error(name .. "_FILE " .. file .. " is empty", 0)
        end
    end
    return secret ~= "" and secret or nil
end


--- Body of `init_by_lua`: runs in the master at each load of the configuration.
-- @param options `{run, state, binary, features, untrusted, ca_bundle, token_file,
--   session_secret_file, lease_ttl, max_held, error_page, error_pages, status_password_file,
--   stream}`
function _M.start(options)
    math.randomseed(ngx.time() * 1000 + ngx.worker.pid())
    load.configure()
    signal.configure()
    if not ctl:get("instance") then
        ctl:set("started_at", ngx.now())
        persist.configure(options.state)
        persist.load()
        ctl:set("instance", random_id())
    end
    persist.configure(options.state)
    lease.configure(options.lease_ttl)
    site.configure(options, certificates.prepare)
    local texts = site.texts()
    certificates.configure(options, texts)
    local token = read_secret("TIDEGATE_ADMIN_TOKEN", options.token_file)
    -- All instances of an agent have the same token, so they read each other's sessions.
    sticky.configure(read_secret("TIDEGATE_SESSION_SECRET", options.session_secret_file)
                     or ngx.hmac_sha1(token or "", "tidegate session"))
    api.configure({
        token = token,
        token_file = options.token_file ~= "" and options.token_file or nil,
        status_password = read_secret("TIDEGATE_STATUS_PASSWORD", options.status_password_file),
        version = _M.version,
        features = options.features,
    })
    -- Those that wait for a peer must not keep out the push that brings it, and take a connection
    -- each to that peer.
    local connections = limits.connections(options.run, texts)
    max_held = max(0, min(options.max_held, floor((connections - OWN_CONNECTIONS) / 2)))
    hold.set_limit(max_held)
    has_stream = options.stream
    local page, err = posix.read(options.error_page)
    if page then
        hold.set_page(page)
    else
        ngx.log(ngx.ERR, "tidegate: the error page cannot be read: ", err)
    end
    if options.error_pages ~= "" then
        for _, status in ipairs(ERRORS) do
            hold.set_page(posix.read(options.error_pages .. "/" .. status .. ".html"), status)
        end
    end
    -- What loading has left behind would go to every worker.
    collectgarbage()
end


--- Body of `init_by_lua` of a configuration that is only tested.
function _M.test()
end


local function guarded(what, job)
    return function(premature)
        if premature then
            metrics.go_direct()
            return
        end
        local ok, err = pcall(job)
        if not ok then
            ngx.log(ngx.ERR, "tidegate: ", what, ": ", err)
        end
    end
end


--- Body of `init_worker_by_lua`.
function _M.start_worker()
    math.randomseed(ngx.now() * 1000 + ngx.worker.pid() * 7919)
    load.start_worker()
    site.worker_started()
    every(1, guarded("counting load", load.sweep))
    if has_stream then
        ctl:set("max_held", max_held)
        bridge.publish(ctl:get("instance"))
    end
    -- Each second, so that a worker that dies leaves nothing undone for long.
    every(1, guarded("counting", metrics.flush))
    every(1, guarded("probing", probe.start_all))
    every(1, guarded("checking", checks.start))
    every(1, guarded("keeping the membership", persist.schedule))
    ngx.timer.at(0, guarded("looking at certificates", certificates.check))
    every(1, guarded("looking at certificates", certificates.check))
    every(30, guarded("sweeping", balancer.sweep))
    every(30, guarded("sweeping", health.sweep))
end


--- Body of `exit_worker_by_lua`.
function _M.stop_worker()
    checks.stop()
    guarded("counting", metrics.flush)()
    guarded("keeping the membership", persist.flush)()
    guarded("counting load", load.stop_worker)()
end


return _M
