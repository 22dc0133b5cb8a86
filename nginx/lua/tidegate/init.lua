--- What happens when nginx loads a configuration, starts a worker and ends one.

local api = require "tidegate.api"
local balancer = require "tidegate.balancer"
local certificates = require "tidegate.certificates"
local hold = require "tidegate.hold"
local lease = require "tidegate.lease"
local metrics = require "tidegate.metrics"
local persist = require "tidegate.persist"
local posix = require "tidegate.posix"
local probe = require "tidegate.probe"
local site = require "tidegate.site"

require "tidegate.backends"

local ctl = ngx.shared.tidegate_ctl

local every = ngx.timer.every
local gsub = string.gsub
local ngx = ngx
local pcall = pcall

local _M = { version = "0.1.0" }


local function random_id()
    local file = io.open("/dev/urandom", "rb")
    local bytes = file:read(16)
    file:close()
    return (gsub(bytes, ".", function(c) return ("%02x"):format(c:byte()) end))
end


local function read_token(options)
    local token = os.getenv("TIDEGATE_ADMIN_TOKEN")
    if options.token_file ~= "" then
        local text, err = posix.read(options.token_file)
        if not text then
            error("TIDEGATE_ADMIN_TOKEN_FILE cannot be read: " .. err, 0)
        end
        token = gsub(text, "%s+$", "")
        if token == "" then
            error("TIDEGATE_ADMIN_TOKEN_FILE " .. options.token_file .. " is empty", 0)
        end
    end
    return token ~= "" and token or nil
end


--- Body of `init_by_lua`: runs in the master at each load of the configuration.
-- @param options `{run, state, binary, features, untrusted, ca_bundle, token_file, lease_ttl,
--   max_held, error_page}`
function _M.start(options)
    math.randomseed(ngx.time() * 1000 + ngx.worker.pid())
    if not ctl:get("instance") then
        ctl:set("started_at", ngx.now())
        persist.configure(options.state)
        persist.load()
        ctl:set("instance", random_id())
    end
    persist.configure(options.state)
    lease.configure(options.lease_ttl)
    site.configure(options, certificates.prepare)
    certificates.configure(options, site.texts())
    api.configure({
        token = read_token(options),
        token_file = options.token_file ~= "" and options.token_file or nil,
        version = _M.version,
        features = options.features,
    })
    hold.set_limit(options.max_held)
    local page, err = posix.read(options.error_page)
    if page then
        hold.set_page(page)
    else
        ngx.log(ngx.ERR, "tidegate: the error page cannot be read: ", err)
    end
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
    site.worker_started()
    -- Each second, so that a worker that dies leaves nothing undone for long.
    every(1, guarded("counting", metrics.flush))
    every(1, guarded("probing", probe.start_all))
    every(1, guarded("keeping the membership", persist.schedule))
    ngx.timer.at(0, guarded("looking at certificates", certificates.check))
    every(1, guarded("looking at certificates", certificates.check))
    every(30, guarded("sweeping", balancer.sweep))
end


--- Body of `exit_worker_by_lua`.
function _M.stop_worker()
    guarded("counting", metrics.flush)()
    guarded("keeping the membership", persist.flush)()
end


return _M
